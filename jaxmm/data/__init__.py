"""From sources of documents to packed batches.

sources.py       documents by index: digits, folders of images with captions, drawn shapes
images.py        reading, fitting and writing pictures
tokenizers.py    text to ids
packing.py       layouts into rows: knows nothing of systems or files
bad_examples.py  records that cannot be used
pipeline.py      Grain: shuffling, epochs, lanes, the state that a checkpoint keeps
"""
