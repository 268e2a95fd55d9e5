"""Errors, options and files, which every part uses; nothing here knows of models."""
