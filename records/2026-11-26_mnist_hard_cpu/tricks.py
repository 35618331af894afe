"""Runs mnist_fast.py with one technique taken out at a time, or times it so: python tricks.py runs|times [ROW...]

For each row a copy of the script gets the row's replacements, and runs with the row's values. `runs` leaves the logs
ROW.jsonl, whose headers hold the copy's text: 100 runs on the test set from seed 1000, those of Adam's learning rates on
held-out images. `times` prints a line of JSON for each run, eleven rounds in turn, of which the first does not count.
DATA_DIR has to be set.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = (HERE.parent.parent / 'mnist_fast.py').read_text(encoding='utf-8')
ADAM = '''    for weight, change in zip(weights[:count], changes):
        state = ADAM.setdefault(weight, {'first': torch.zeros_like(weight), 'second': torch.zeros_like(weight), 'steps': 0})
        state['steps'] += 1
        state['first'].lerp_(weight.grad, 1 - 0.7)
        state['second'].lerp_(weight.grad**2, 1 - 0.9)
        first, second = state['first'] / (1 - 0.7**state['steps']), state['second'] / (1 - 0.9**state['steps'])
        change.copy_(first / (second.sqrt() + 1e-8))
'''
ADAM_PARTS = [('    orthogonalize(changes[:count], dtype)\n', ADAM), ('STEPS = ', 'ADAM = {}\nSTEPS = '),
              ('        torch.manual_seed(seed)\n', '        torch.manual_seed(seed)\n        ADAM.clear()\n')]
ROWS = {
    'default': ([], []),
    'no_linear_classifier': (['opt.hard_share=1'], []),
    'before': (['opt.hard_share=1', 'opt.candidates=4', 'opt.epochs=0.28', 'tta.share=0.1'], []),  # the default before
    'no_losses': (['opt.candidates=1'], []),
    'all_images': (['opt.hard_share=1', 'opt.candidates=1', 'opt.epochs=0.6'], []),  # as many images are drawn
    'first_layer_learns': ([], [("hyp['opt']['candidates'], False)", "hyp['opt']['candidates'], True)")]),
    'select_after_0': (['opt.select_after=0'], []),
    'no_whitening': ([], [('    net.conv1.weight[:len(filters)] = filters.to(images.device)\n', '')]),
    'no_label_smoothing': (['opt.label_smoothing=0'], []),
    'no_average': (['ema.decay=0'], []),
    'no_crop': (['net.crop=28'], []),
    'contiguous': ([], [("return torch.contiguous_format if device.type == 'mps' else torch.channels_last",
                         'return torch.contiguous_format')]),
    **{f'adam_{lr}': ([f'opt.lr={lr}'], ADAM_PARTS) for lr in (0.006, 0.01, 0.015, 0.025, 0.04)},  # held out, to choose a rate
    'adam': (['opt.lr=0.015'], ADAM_PARTS),
}

def changed(replacements):
    source = SOURCE
    for old, new in replacements:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source

if sys.argv[1] == 'runs':
    for row in sys.argv[2:] or ROWS:
        values, replacements = ROWS[row]
        start = ['run.holdout=10000'] if row.startswith('adam_') else ['run.seed=1000']
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'mnist_fast.py'
            path.write_text(changed(replacements), encoding='utf-8')
            result = subprocess.run([sys.executable, str(path), 'run.runs=100', *start, *values,
                                     f'run.log={HERE / row}.jsonl'], capture_output=True, text=True)
        print(row, result.stdout.splitlines()[-1:], result.stderr[-300:], flush=True)
else:
    import torch
    torch.set_num_threads(1)
    cpu = torch.device('cpu')
    programs = {}
    for row, (values, replacements) in ROWS.items():
        if not row.startswith('adam'):
            names = {'__name__': 'script'}
            exec(compile(changed(replacements), row, 'exec'), names)
            names['override'](values)
            programs[row] = names['build'](names['load_data'](cpu), cpu, None)[0]
    for turn in range(11):
        for row, train in programs.items():
            start = time.perf_counter()
            train(turn)[0].tolist()
            print(json.dumps({'row': row, 'round': turn, 'time_s': round(time.perf_counter() - start, 4)}), flush=True)
