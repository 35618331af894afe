"""Seconds of three Newton-Schulz steps, as the scripts take them and on the m x m Gram matrix: prints microseconds
(medians of 40) and the error relative to the same steps in float64. The argument is the number of threads."""
import statistics
import sys
import time

import torch

torch.set_num_threads(int(sys.argv[1]))
A, B, C = 3.4445, -4.7750, 2.0315
SHAPES = {'mnist_fast': (torch.float32, [(1, 16, 16), (1, 32, 144), (1, 64, 512)]),
          'fashion_fast': (torch.bfloat16, [(2, 32, 288), (2, 64, 576), (2, 192, 1728)]),
          'cifar_fast': (torch.bfloat16, [(2, 64, 576), (2, 256, 2304), (2, 384, 3456)])}

def as_they_are(x):
    for _ in range(3):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, gram, x, beta=A)
    return x

def on_gram_matrix(x):
    """Each step multiplies x by a polynomial of x x'. The product of the three is made of m x m matrices."""
    gram = x @ x.mT
    product = torch.eye(x.shape[1], dtype=x.dtype).expand_as(gram)
    for _ in range(3):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        gram = torch.baddbmm(gram, factor, gram, beta=A)
        gram = torch.baddbmm(gram, gram, factor, beta=A)
        product = torch.baddbmm(product, factor, product, beta=A)
    return product @ x

def microseconds(function, x):
    times = []
    for _ in range(43):
        started = time.perf_counter()
        function(x)
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times[3:])

torch.manual_seed(0)
for script, (dtype, shapes) in SHAPES.items():
    totals = [0.0, 0.0]
    for shape in shapes:
        x = torch.randn(shape)
        x = (x / x.norm(dim=(1, 2), keepdim=True)).to(dtype)
        exact = as_they_are(x.double())
        for place, function in enumerate((as_they_are, on_gram_matrix)):
            error = ((function(x) - exact).norm() / exact.norm()).item()
            time_us = microseconds(function, x)
            totals[place] += time_us
            print(f'{script} {shape} {function.__name__}: {time_us:.0f} us, error {error:.4f}')
    print(f'{script}, a step: {totals[0]:.0f} and {totals[1]:.0f} us')
