"""Runs a script with many settings in one process: python search.py SPECS LOG

SPECS has a setting in each line: a label, the script's path, key=value pairs. Each appends to LOG, whose header lines hold
the script's source text and values. DATA_DIR has to be set.
"""
import gc
import sys
import torch

specs, log = sys.argv[1:]
for line in open(specs):
    label, path, *overrides = line.split()
    names = {'__name__': 'script', '__file__': path}
    exec(compile(open(path, encoding='utf-8').read(), path, 'exec'), names)
    names['override']([*overrides, f'run.log={log}'])
    device, dtype = names['pick_device']()
    print(label, flush=True)
    names['run_all'](device, dtype, None)
    del names
    gc.collect()
    torch.cuda.empty_cache()
