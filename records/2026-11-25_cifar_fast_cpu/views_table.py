import sys,torch
R={}
for p in sys.argv[1:]:
    d=torch.load(p); P,l=d['P'],d['labels']
    def acc(keys,soft=False,w=None):
        f=(lambda x:x.softmax(1)) if soft else (lambda x:x)
        w=w or [1]*len(keys)
        return 100*(sum(a*f(P[k]) for a,k in zip(w,keys)).argmax(1)==l).float().mean().item()
    two=[(0,0,0),(0,0,1)]
    def both(places): return [(a,b,f) for a,b in places for f in (0,1)]
    diag=both([(-1,-1),(1,1)]); anti=both([(-1,1),(1,-1)]); side=both([(-1,0),(1,0),(0,1),(0,-1)]); side2=both([(-2,0),(2,0),(0,2),(0,-2)])
    s28=[(28,0),(28,1)]; s36=[(36,0),(36,1)]
    V={'plain':[(0,0,0)],'two':two,'six':two+diag,'four diag only':diag,'ten4':two+diag+anti,'ten side':two+side,'18':two+side+diag+anti,'side2':two+side2,'two+28':two+s28,'two+36':two+s36,'six+28':two+diag+s28,'six+36':two+diag+s36,'six+28+36':two+diag+s28+s36,'ten4+36':two+diag+anti+s36,'ten4+28':two+diag+anti+s28,'all':two+diag+anti+side+side2+s28+s36}
    for k,v in V.items():
        R.setdefault(k,[]).append(acc(v)); R.setdefault(k+' soft',[]).append(acc(v,True))
    R.setdefault('six 211',[]).append(acc(two+diag,w=[2,2,1,1,1,1])); R.setdefault('six 211 soft',[]).append(acc(two+diag,True,w=[2,2,1,1,1,1]))
for k,v in R.items(): print(f'{k:20s}',' '.join(f'{x:.2f}' for x in v), f'mean {sum(v)/len(v):.3f}')
