"""Names of a model's parts, as errors, logs and reports use them."""

LANGUAGE_MODEL, PROJECTOR, HEAD, TOKENIZER = "language model", "projector", "head", "tokenizer"
CLASS_MODEL = "class-conditional model"  # an ImageNet model: backbone and head in one
PROMPTS = "prompt tokenizer"  # a tokenizer.json stored as a tensor of bytes
