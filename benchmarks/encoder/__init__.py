"""All merging methods on one real text encoder, fine-tuned for tasks that have nothing to do with each other."""
