"""Methods that shrink other things than a cache's width, on original models and on students: prompts and caches."""
