"""Networks made ready to run: packed kernels, fused blocks, the packed file, and how fast it all is.

| file | owns |
| --- | --- |
| forms.py | what a binary convolution computes in evaluation, seen from outside: signs, one scale and bias per filter |
| folds.py | a Rep network's graph with folds moved out of its blocks |
| match.py | the blocks of a captured network that a fused kernel can run, and why others are none |
| fuse.py | a network whose blocks run fused; everything else as it was |
| agreement.py | two forms of one network compared: logits, and the signs that rounding flipped |
| packed.py | the packed file: what is in it, writing it, and making a network of it again |
| packed_kernels.py | modules whose kernel is given as bits and a scale |
| zeros.py | weights with sign 0, counted |
| latency.py | time per batch, several networks taking turns |
"""
