"""Lookups at scale: batch jobs, joins in SQL. Nothing here imports torch."""
