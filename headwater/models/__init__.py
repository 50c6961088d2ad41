"""Models: small reference ones that train in minutes on a CPU, and adapters to pretrained ones.

An adapter turns a model folder or a GGUF file into a plain float module and its tokenizer; the core
sees only the module.
"""
