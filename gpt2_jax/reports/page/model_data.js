// The data of the page: facts, and arrays by name.

const FACTS = data;
const T = FACTS.tokens.length;
const L = FACTS.layers;
const H = FACTS.heads;
const ARRAYS = {};
const SHAPE = {};

async function unpackArrays() {
  for (const [name, packed] of Object.entries(FACTS.arrays)) {
    const {shape, values} = await unpack(packed);
    SHAPE[name] = shape;
    ARRAYS[name] = values;
  }
}

const has = name => name in ARRAYS;

// The element of an array at some indices: at('loss', p), at('logit.rank', layer, p).
function at(name, ...indices) {
  const shape = SHAPE[name];
  let flat = 0;
  indices.forEach((index, axis) => { flat = flat * shape[axis] + index; });
  return ARRAYS[name][flat];
}

// Where the pair (p, s) with s <= p lies in a row of packed pairs.
const pair = (p, s) => p * (p + 1) / 2 + s;

// The square root of an attention weight, 0 to 1, as the page stores it; and the weight.
function rootWeight(layer, head, p, s) {
  return s > p ? 0 : at('pattern', layer, head, pair(p, s)) / FACTS.levels;
}
const weight = (layer, head, p, s) => rootWeight(layer, head, p, s) ** 2;

// The norm of the gradient of the loss at position p in the residual stream at a layer and position s.
const gradientNorm = (layer, p, s) => s > p ? 0 : at('gradient.resid', layer, pair(p, s));

const tokenText = id => FACTS.text[id];
const textAt = index => FACTS.shown[index];
const targetText = p => p < T - 1 ? textAt(p + 1) : tokenText(at('target', p));

const LAYER_NAMES = ['embed', ...Array.from({length: L}, (_, i) => `h_${i}`)];
const partName = (layer, part) => part < H ? `h_${layer}.attn.${part}` : `h_${layer}.mlp`;

function mean(values) {
  let sum = 0;
  for (const value of values) sum += value;
  return values.length ? sum / values.length : 0;
}

// Whether tokens are pieces of words, not characters.
const WORDS = FACTS.tokens.some(id => tokenText(id).length > 1);

// The losses of the text itself: of every token but the first.
const textLosses = () => Array.from({length: T - 1}, (_, p) => at('loss', p));
const meanLoss = () => mean(textLosses());
const lossChanges = (layer, part) => Array.from({length: T - 1}, (_, p) => at('ablation', layer, part, p));

// '2.136 → 2.437 nats (+0.301)': the mean loss of the text, and without a part.
function meanWithout({layer, part}) {
  const change = mean(lossChanges(layer, part));
  return `${meanLoss().toFixed(3)} → ${(meanLoss() + change).toFixed(3)} nats (${signed(change)})`;
}

// The probability of the k-th likeliest token after a layer; that of the target is stored exactly.
function topProbability(lens, layer, p, k) {
  const right = at(`${lens}.top`, layer, p, k) === at('target', p);
  return right ? at(`${lens}.right`, layer, p) : at(`${lens}.prob`, layer, p, k);
}

// What a head looks at in this text, averaged over the positions that have such a token.
const LOOKS = {
  previous: {name: 'the token before', find: p => p - 1},
  itself: {name: 'itself', find: p => p},
  first: {name: 'the first token', find: p => p > 0 ? 0 : -1},
};
function looksAt(kind, layer, head) {
  const found = [];
  for (let p = 1; p < T; p++) found.push(weight(layer, head, p, LOOKS[kind].find(p)));
  return mean(found);
}

// What it would be if a head looked at all positions up to its own alike.
const alike = positions => mean(positions.map(p => 1 / (p + 1)));
const uniform = {
  text: alike(Array.from({length: T - 1}, (_, i) => i + 1)),
  random: alike(Array.from({length: FACTS.repeated}, (_, i) => FACTS.repeated + i)),
};

const SCORES = {
  previous: 'the token before',
  duplicate: 'the same token, earlier',
  induction: 'what followed the same token (induction)',
};

const signed = x => Math.abs(x) < 5e-4 ? '0' : (x < 0 ? '−' : '+') + Math.abs(x).toFixed(3);
