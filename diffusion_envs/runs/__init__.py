"""What a fine-tuning run leaves: logs, pictures, checkpoints, evaluations, a verdict, a report."""
