"""What the library does with any variant: select, attach, run, inspect, save, load, merge, detach.

It promises that whatever can fail does so before the model is changed, that coefficient 0 is the base bit for bit, that detach
and unmerge give every bit back, and that it knows no method by name. selection.py chooses layers, and fitness.py says what
"all-linear" leaves out (output embeddings such as lm_head, heads, routers). attach.py and load.py end in install.py and
return a handle (handle.py); the hooks that they hang are in contract/adapter.py; finding.py finds what is attached.
coefficients.py scales. quiet.py waits for a moment without a forward, atomic.py undoes what was interrupted. A file is
checkpoint.py, save.py, load.py and fingerprint.py. A variant's author needs none of it.
"""
