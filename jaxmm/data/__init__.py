"""From sources of documents to packed batches.

sources.py       documents by index: what needs no files, and the names of all sources
folder.py        folders of images with captions
text.py          files of text
tfds.py          datasets of TensorFlow Datasets
latents.py       images as a frozen codec has read them
mixture.py       several sources in stated shares
images.py        reading, fitting and writing pictures
tokenizers.py    text to ids
packing.py       layouts into rows: knows nothing of systems or files
bad_examples.py  records that cannot be used
pipeline.py      Grain: shuffling, epochs, lanes, the state that a checkpoint keeps
"""
