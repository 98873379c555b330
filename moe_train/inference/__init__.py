"""Use a trained model: score token ids, generate text, on any layout. Importing it imports nothing."""
