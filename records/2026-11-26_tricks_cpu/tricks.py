"""Runs a script with one technique taken out at a time: python tricks.py mnist|fashion|cifar [ROW...]

For each row it writes a copy of the script with the row's replacements, runs it with the row's values, and leaves the log
SCRIPT/ROW.jsonl, whose header holds the copy's text. DATA_DIR has to be set.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = {
    'mnist': ['run.runs=100'],
    'fashion': ['opt.epochs=2', 'run.dtype=bfloat16', 'run.runs=4'],
    'cifar': ['opt.epochs=2.2', 'opt.full_passes=1', 'net.widths=(32,64,64)', 'run.dtype=bfloat16', 'run.runs=4'],
}
ORTHOGONAL = '    orthogonalize(changes, dtype)\n'
ADAM = '''    for weight, change in zip(weights, changes):
        state = ADAM.setdefault(weight, {'first': torch.zeros_like(weight), 'second': torch.zeros_like(weight), 'steps': 0})
        state['steps'] += 1
        state['first'].lerp_(weight.grad, 1 - 0.7)
        state['second'].lerp_(weight.grad**2, 1 - 0.9)
        first, second = state['first'] / (1 - 0.7**state['steps']), state['second'] / (1 - 0.9**state['steps'])
        change.copy_(first / (second.sqrt() + 1e-8))
'''
ADAM_PARTS = [(ORTHOGONAL, ADAM), ('STEPS = ', 'ADAM = {}\nSTEPS = '),
              ('        torch.manual_seed(seed)\n', '        torch.manual_seed(seed)\n        ADAM.clear()\n')]
LENGTHS = '''
    torch._foreach_div_(weights, torch._foreach_norm(weights))
    torch._foreach_mul_(weights, [len(weight)**0.5 for weight in weights])
'''
WHITEN = '    net.whiten.weight.copy_(torch.cat((filters, -filters)).view(net.whiten.weight.shape))\n'
FIXED = '        self.whiten.weight.requires_grad = False\n'

ROWS = {
    'mnist': {
        'default': ([], []),
        'all_images': (['opt.candidates=1', 'opt.epochs=0.9'], []),  # as many images are drawn
        'first_layer_learns': ([], [('hyp[\'opt\'][\'candidates\'], False)', 'hyp[\'opt\'][\'candidates\'], True)')]),
        'select_after_0': (['opt.select_after=0'], []),
        'no_whitening': ([], [('    net.conv1.weight[:len(filters)] = filters.to(images.device)\n', '')]),
        'no_label_smoothing': (['opt.label_smoothing=0'], []),
        'no_average': (['ema.decay=0'], []),
        'no_crop': (['net.crop=28'], []),
        'contiguous': ([], [('return torch.contiguous_format if device.type == \'mps\' else torch.channels_last',
                             'return torch.contiguous_format')]),
        'adam': (['opt.lr=0.025'], ADAM_PARTS),
        **{f'adam_{lr}': ([f'opt.lr={lr}'], ADAM_PARTS)
           for lr in (0.003, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06)},  # held out, to choose a rate
    },
    'fashion': {
        'default': ([], []),
        'all_images': (['opt.candidates=1'], []),
        'no_whitening': ([], [(WHITEN, ''), (FIXED, '')]),
        'sgd': (['opt.lr=0.001'], [(ORTHOGONAL, '')]),
        'trained_scales': ([], [('        self.weight.requires_grad = False\n\n', '\n')]),
        'free_lengths': ([], [(LENGTHS, '')]),
        'no_flip': (['aug.flip=False'], []),
        'shift': (['aug.shift=1'], []),
        'no_label_smoothing': (['opt.label_smoothing=0'], []),
        'no_average': (['ema.decay=0'], []),
    },
    'cifar': {
        'default': ([], []),
        'all_images': (['opt.hard_share=1'], []),
        'full_size': (['opt.small_size=32'], []),
        'no_whitening': ([], [(WHITEN, ''), (FIXED, '')]),
        **{f'sgd_{lr}': ([f'opt.lr={lr}'], [(ORTHOGONAL, '')])
           for lr in (0.0004, 0.0007, 0.0014, 0.0028, 0.0056)},  # held out, to choose a rate
        'sgd': (['opt.lr=0.0028'], [(ORTHOGONAL, '')]),
        'free_lengths': ([], [(LENGTHS, '')]),
        'random_filters': ([], [('        conv.weight[:passed] = 0\n', ''),
                                ('        conv.weight[:passed, :passed, 1, 1].fill_diagonal_(1)\n', '        pass\n')]),
        'no_flip': (['aug.flip=False'], []),
        'random_flip': ([], [('                state.mirrored.logical_not_()',
                              '                state.mirrored.copy_(torch.rand(len(images), device=device) < 0.5)')]),
        'no_shift': (['aug.shift=0'], []),
        'no_label_smoothing': (['opt.label_smoothing=0'], []),
        'no_average': (['ema.decay=0'], []),
    },
}

name, *wanted = sys.argv[1:]
rows = ROWS[name]
(HERE / name).mkdir(exist_ok=True)
for row in wanted or rows:
    values, replacements = rows[row]
    source = (HERE.parent.parent / f'{name}_fast.py').read_text(encoding='utf-8')
    for old, new in replacements:
        assert source.count(old) == 1, (row, old, source.count(old))
        source = source.replace(old, new)
    start = ['run.holdout=10000'] if row.startswith(('adam_', 'sgd_')) else ['run.seed=1000']
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'{name}_fast.py'
        path.write_text(source, encoding='utf-8')
        log = HERE / name / f'{row}.jsonl'
        result = subprocess.run([sys.executable, str(path), *BASE[name], *start, *values, f'run.log={log}'],
                                capture_output=True, text=True)
    print(row, result.stdout.splitlines()[-1:], result.stderr[-300:], flush=True)
