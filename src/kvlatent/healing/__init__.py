"""Training a student towards its teacher."""
