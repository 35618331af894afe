import sys,torch,torch.nn.functional as F
torch.set_num_threads(1)
names={'__name__':'script','__file__':'fashion_fast.py'}
exec(compile(open('fashion_fast.py').read(),'f','exec'),names)
names['override'](['run.holdout=10000','opt.epochs=1.5','opt.head_lr=3e-5','data.dir=data'])
dev=torch.device('cpu'); data=names['load_data'](dev)
train,net,*_=names['build'](data,dev,torch.bfloat16)
R={}
for seed in range(4):
    train(seed); net.eval()
    images,l=data['test']['images'],data['test']['labels']
    pad=F.pad(images.float(),(1,1,1,1),'reflect'); P={}
    with torch.no_grad(), torch.autocast('cpu',torch.bfloat16,cache_enabled=False):
        for d in (-1,0,1):
            for r in (-1,0,1):
                for f in (0,1):
                    x=pad[:,:,1+d:29+d,1+r:29+r]; x=x.flip(3) if f else x
                    P[d,r,f]=torch.cat([net(p) for p in x.split(2500)]).float()
    net.train()
    def acc(keys,soft,w=None,share=1.0):
        f=(lambda x:x.softmax(1)) if soft else (lambda x:x)
        w=w or [1]*len(keys)
        base=P[0,0,0].softmax(1); a,b=base.topk(2).values.T
        unc=(b-a).topk(int(share*len(l))).indices
        ans=P[0,0,0].argmax(1).clone(); ans[unc]=sum(a*f(P[k]) for a,k in zip(w,keys)).argmax(1)[unc]
        return 100*(ans==l).float().mean().item()
    def both(pl): return [(a,b,f) for a,b in pl for f in (0,1)]
    c=both([(0,0)]); diag=both([(-1,-1),(1,1)]); anti=both([(-1,1),(1,-1)]); side=both([(-1,0),(1,0),(0,1),(0,-1)])
    V={'plain':([(0,0,0)],None),'two':(c,None),'six diag':(c+diag,None),'ten side':(c+side,None),'ten side, centre 2 1':(c+side,[2,1]+[1]*8),'ten diag4':(c+diag+anti,None),'18':(c+diag+anti+side,None)}
    for k,(v,w) in V.items():
        for soft in (0,1):
            for sh in (.15,.25,1.0): R.setdefault((k,'soft' if soft else 'logits',sh),[]).append(acc(v,soft,w,sh))
for k,v in R.items(): print(k,' '.join(f'{x:.2f}' for x in v),f'{sum(v)/len(v):.3f}',flush=True)
