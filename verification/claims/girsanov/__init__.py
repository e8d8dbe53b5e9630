"""Change of measure: KL and likelihood ratio of path laws, their bounds and limits."""
