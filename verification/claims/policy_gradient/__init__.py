"""The policy gradient theorem, its estimators, trust regions, policy iteration."""
