"""Networks as policies: what each model family says, and how its adapter is made and exported."""
