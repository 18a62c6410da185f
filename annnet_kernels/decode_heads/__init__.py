"""Decode heads of other code bases, run with their linear maps moved to the resolution at which they cost least.

``algebra`` holds the mathematics (tensors in, tensors out), ``parts`` the modules of a head, ``segformer``, ``pspnet``
and ``upernet`` what these are called in each code base and in which order a head calls them, ``replacing`` the exchange
of a head's class. :func:`annnet_kernels.replace_blocks` is the door.
"""
