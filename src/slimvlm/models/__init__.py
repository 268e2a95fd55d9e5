"""Model families as data; what a model is made of; reading it and running it."""
