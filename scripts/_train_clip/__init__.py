"""What `scripts/train_clip.py` is made of.

options.py     the command line
data.py        images with captions, or images in pairs
text.py        a text model: somebody's, or a tiny BERT whose words come from the captions
towers.py      two towers as one module that gives embeddings, scale and bias
training.py    the loop, on one process or several
with_text.py   tower and text model: collating, zero-shot accuracy, saving, and that the pipeline gives the same scores
with_pairs.py  two image towers: the same
publishing.py  model card, push
main.py        these in their order
"""
