"""A page that shows a dump: what it is made of, its boards, its activations, what the model says.

Each section is a module that first takes its figures from the file, in NumPy, and then draws them.
"""
