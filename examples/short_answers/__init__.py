"""Short-answer assessment: corpora, word vectors, models and their training."""
