"""Predictors, one package for each library; nothing here is imported before it is used."""
