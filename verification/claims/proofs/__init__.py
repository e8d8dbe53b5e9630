"""Identities of symbols."""
