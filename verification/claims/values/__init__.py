"""Values and q-rates: martingale conditions, policy evaluation, q-learning, the HJB equation."""
