"""Seconds of a run of mnist_fast.py with one technique taken out at a time, in turn: python times.py ROUNDS > times.jsonl

One thread. A line of JSON for each run; the first round does not count. DATA_DIR has to be set.
"""
import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
text = (HERE / 'tricks.py').read_text(encoding='utf-8').partition('\nname, *wanted')[0]
tricks = {'__file__': __file__}
exec(text, tricks)
torch.set_num_threads(1)
cpu = torch.device('cpu')

programs = {}
for row, (values, replacements) in tricks['ROWS']['mnist'].items():
    if not row.startswith('adam_'):
        source = (HERE.parent.parent / 'mnist_fast.py').read_text(encoding='utf-8')
        for old, new in replacements:
            source = source.replace(old, new)
        names = {'__name__': 'script'}
        exec(compile(source, row, 'exec'), names)
        names['override'](values)
        programs[row] = names['build'](names['load_data'](cpu), cpu, None)[0]

for turn in range(int(sys.argv[1])):
    for row, train in programs.items():
        start = time.perf_counter()
        train(turn)[0].tolist()
        print(json.dumps({'row': row, 'round': turn, 'time_s': round(time.perf_counter() - start, 4)}), flush=True)
