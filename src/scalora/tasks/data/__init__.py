"""Rows for a task, from files, packaged data or the hub."""
