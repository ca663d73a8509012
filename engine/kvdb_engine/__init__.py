"""The model: architecture, state, packing, sampling, tokenizer, chat format and the worker process."""
