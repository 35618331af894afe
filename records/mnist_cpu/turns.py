"""Programs in turn, each in a process of its own, two threads: python turns.py BEFORE NOW STAGE8 ROUNDS > turns.jsonl

BEFORE and NOW are paths of mnist_fast.py, STAGE8 of train_mnist_fast's stage 8. In all of them the C library keeps freed
memory. A line of JSON for each run; the first one of a process warms up and is dropped.
"""
import ctypes
import importlib.util
import json
import runpy
import subprocess
import sys
import time

def ours(path):
    sys.argv = [path]
    names = runpy.run_path(path, run_name='script')
    names['override']([])
    device, dtype = names['pick_device']()
    data = names['load_data'](device)
    train = names['build'](data, device, dtype)[0]
    return lambda seed: train(seed)[0].tolist()[0]

def theirs(path):
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    import torch
    spec = importlib.util.spec_from_file_location('stage8', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = torch.load('data/MNIST.pt')

    def prepared(part):
        return (part['images'].float() / 255 - 0.1307) / 0.3081, part['labels']

    run = module.make(*prepared(data['train']), *prepared(data['test']))
    return lambda seed: run(seed)['acc']

if sys.argv[1] == 'one':
    name, path, runs = sys.argv[2:]
    run = theirs(path) if name == 'stage 8' else ours(path)
    for seed in range(1000, 1001 + int(runs)):
        start = time.perf_counter()
        acc = run(seed)
        time_s = time.perf_counter() - start
        if seed > 1000:
            print(json.dumps({'program': name, 'acc': round(acc, 4), 'time_s': round(time_s, 4)}), flush=True)
else:
    before, now, stage8, rounds = sys.argv[1:]
    for _ in range(int(rounds)):
        for name, path, runs in (('before', before, 9), ('now', now, 9), ('stage 8', stage8, 2)):
            subprocess.run([sys.executable, sys.argv[0], 'one', name, path, str(runs)], check=True)
