"""Variants of test-time augmentation on the same trained networks, held out."""
import sys, torch, math, statistics, json
import torch.nn.functional as F
script, runs, *over = sys.argv[1:]
names = {'__name__': 'script', '__file__': script}
exec(compile(open(script).read(), script, 'exec'), names)
names['override'](['run.holdout=10000', *over])
hyp = names['hyp']
device, dtype = names['pick_device']()
data = names['load_data'](device)
out = {}
@torch.no_grad()
def evaluate(net, state, data):
    if 'mnist' in script or 'fashion' in script:
        torch._foreach_copy_(state.weights, state.average)
    net.eval()
    images, labels = data['test']['images'], data['test']['labels']
    def predict(x):
        with state.autocast:
            return torch.cat([net(p) for p in x.split(1000)]).float()
    logits = predict(images)
    acc = lambda l: (l.argmax(1) == labels).float().mean().item()
    out.setdefault('plain', []).append(acc(logits))
    flip = hyp['aug'].get('flip', False)
    H, W = images.shape[2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), 'reflect')
    def shifted(d, r):
        return padded[:, :, 1 + d:1 + d + H, 1 + r:1 + r + W]
    preds = {}
    for d, r in ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (1, 1)):
        preds[d, r, 0] = predict(shifted(d, r))
        if flip:
            preds[d, r, 1] = predict(shifted(d, r).flip(3))
    first, second = logits.softmax(1).topk(2).values.T
    sets = {'plus': [(0, 0), (-1, 0), (0, -1), (0, 1), (1, 0)], 'diag': [(0, 0), (-1, -1), (1, 1)]}
    for share in (0.1, 0.25, 0.5, 1.0):
        uncertain = (second - first).topk(math.ceil(share * len(labels))).indices
        for name, places in sets.items():
            for center in (1, 2):
                for kind, f in (('logits', lambda x: x), ('probs', lambda x: x.softmax(1))):
                    total = sum((center if p == (0, 0) else 1) * f(preds[(*p, m)]) for p in places for m in ((0, 1) if flip else (0,)))
                    mixed = f(logits.clone()); mixed[uncertain] = total[uncertain]
                    out.setdefault(f'{name} center {center} {kind} {share}', []).append(acc(mixed))
    net.train()
names['evaluate'] = evaluate
train, net, _ = names['build'](data, device, dtype)
names['progress'] = lambda *a: None
for seed in range(int(runs)):
    train(seed)
for key, accs in sorted(out.items(), key=lambda kv: -statistics.mean(kv[1])):
    print(f'{key:32s} {statistics.mean(accs):.5f} +- {statistics.stdev(accs) / math.sqrt(len(accs)):.5f}')
