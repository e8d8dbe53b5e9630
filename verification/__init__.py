"""Every theorem checked on problems whose answers are known exactly."""
