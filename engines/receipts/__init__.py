"""What the owner of a GPU sends back, and what is checked of it elsewhere.

``receipt`` is the page to read first: it runs and measures everything and writes one JSON file. ``received`` reads that
file, ``replay`` makes every figure in it again, and ``verified_on`` makes the table of the README from those that hold.
"""
