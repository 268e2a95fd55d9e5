"""What every part uses: errors, options, files. Knows nothing of models."""
