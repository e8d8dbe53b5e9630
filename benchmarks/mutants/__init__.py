"""Mutation testing of the formula modules: which small mistakes would the tests not notice?"""
