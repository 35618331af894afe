"""Seconds of a step and of the test, of programs in turn: python steps.py OLD NEW ROUNDS key=value ... > steps.jsonl

Each program in a process of its own. A line of JSON for each process: the medians of the first and of the second half
of the steps (without the first step of each), and the seconds from the last step to the result.
"""
import json
import runpy
import statistics
import subprocess
import sys
import time

if sys.argv[1] == 'one':
    path, *arguments = sys.argv[2:]
    sys.argv = [path]
    names = runpy.run_path(path, run_name='script')
    names['override'](arguments)
    device, dtype = names['pick_device']()
    data = names['load_data'](device)
    stamps = []
    names['build'].__globals__['progress'] = lambda *rest: stamps.append(time.perf_counter())
    train = names['build'](data, device, dtype)[0]
    train(0)
    end = time.perf_counter()
    steps = [b - a for a, b in zip(stamps, stamps[1:])]
    half = len(stamps) // 2
    print(json.dumps({'program': path.split('/')[-2] + '/' + path.split('/')[-1], 'first_half': statistics.median(steps[1:half - 1]),
                      'second_half': statistics.median(steps[half:]), 'test': end - stamps[-1]}), flush=True)
else:
    old, new, rounds, *arguments = sys.argv[1:]
    for _ in range(int(rounds)):
        for path in (old, new):
            subprocess.run([sys.executable, sys.argv[0], 'one', path, *arguments], check=True)
