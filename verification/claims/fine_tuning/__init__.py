"""Fine-tuning: the KL-tilted optimum, objectives, the training loop, the frontier."""
