"""The embedded default model: a tiny Stable Diffusion, its weights and how they were trained."""
