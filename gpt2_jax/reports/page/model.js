// The page: the text, the chosen guess, tabs, keys, and the start.

const $ = id => document.getElementById(id);

const KEYS = {
  '← →': 'the token before, the next token',
  '↑ ↓': 'another layer, while the picture of all heads has the focus',
  'h l': 'another head',
  'a': 'ablate the chosen head, or put it back',
  '1 … 8': 'the views',
  't': 'light or dark',
  '?': 'this help',
};

// Changes what is chosen and draws again what depends on it.
function change(changes) {
  Object.assign(state, changes);
  state.p = Math.max(0, Math.min(T - 1, state.p));
  hideTip();
  drawText();
  drawChosen();
  drawView();
  const ablated = state.ablated ? `&ablated=${partName(state.ablated.layer, state.ablated.part)}` : '';
  history.replaceState(null, '', `#view=${state.view}&token=${state.p + 1}&head=h_${state.layer}.attn.${state.head}${ablated}`);
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.get('view') in VIEWS) state.view = given.get('view');
  if (given.has('token')) state.p = Math.max(0, Math.min(T - 1, Number(given.get('token')) - 1 || 0));
  const head = (given.get('head') || '').match(/^h_(\d+)\.attn\.(\d+)$/);
  if (head && head[1] < L && head[2] < H) [state.layer, state.head] = [Number(head[1]), Number(head[2])];
  const part = (given.get('ablated') || '').match(/^h_(\d+)\.(?:attn\.(\d+)|mlp)$/);
  if (part && has('ablation') && part[1] < L) state.ablated = {layer: Number(part[1]), part: part[2] === undefined ? H : Number(part[2])};
}

const FULL_COLOUR = FACTS.vocabulary > 1000 ? 10 : 5; // nats of loss, from which on the colour stays

// What the colours of the text show: the loss, or its change without the ablated part.
function colourOf(p) {
  if (!state.ablated) return boxStyle('warm', at('loss', p) / FULL_COLOUR);
  const {layer, part} = state.ablated;
  return boxStyle('diverging', diverging(at('ablation', layer, part, p), 2));
}

function drawText() {
  const box = $('tokens');
  if (!box.childElementCount) {
    box.classList.toggle('words', WORDS);
    FACTS.shown.forEach((text, index) => {
      const span = el('span', {class: `token ${index >= FACTS.prompt ? 'own' : ''} ${index ? '' : 'first'}`, role: 'option', 'data-token': index, id: `token-${index}`},
        visible(text).replace(/␣/g, ' '));
      box.append(span);
      if (text.includes('\n')) box.append(el('br'));
    });
    box.append(el('span', {class: 'token next', role: 'option', 'data-token': T, id: `token-${T}`}, 'next?'));
  }
  for (const span of box.querySelectorAll('.token')) {
    const index = Number(span.dataset.token);
    if (index > 0 && index < T) span.style = colourOf(index - 1);
    const here = index === state.p + 1;
    span.classList.toggle('here', here);
    span.setAttribute('aria-selected', String(here));
    if (here) {
      box.setAttribute('aria-activedescendant', span.id);
      const [outer, inner] = [box.getBoundingClientRect(), span.getBoundingClientRect()];
      if (inner.top < outer.top || inner.bottom > outer.bottom) box.scrollTop += inner.top - outer.top - outer.height / 2;
    }
  }
  const own = FACTS.prompt < T;
  $('legend').replaceChildren(
    state.ablated ? scaleKey('diverging', 'loss −2', '+2 nats') : scaleKey('warm', 'loss 0', `${FULL_COLOUR} nats`),
    own ? el('span', {}, 'dotted: written by the model') : '',
    FACTS.shown.includes('‥') ? el('span', {}, '‥: part of a character, which its last token shows') : '');
  const given = Math.max(0, FACTS.prompt - 1);
  $('mean').textContent = `mean loss of this text ${meanLoss().toFixed(3)} nats over ${T - 1} guesses`
    + (own ? ` (${given} of the prompt, ${T - 1 - given} written by the model)` : '');
  // Where the tabs stick on a phone.
  document.documentElement.style.setProperty('--text-height', `${$('text').offsetHeight}px`);
  $('ablated').hidden = !state.ablated;
  if (state.ablated) {
    const whole = ['attention', 'ablation'].includes(state.view) ? ''
      : ' The views below show the whole model; only the colours of the text and the changes on the Ablation tab are without this head.';
    $('ablated').replaceChildren('Without ', el('b', {class: 'code'}, partName(state.ablated.layer, state.ablated.part)), ': mean loss ', el('b', {id: 'mean-without'}, meanWithout(state.ablated)), '.', whole.replace('head', state.ablated.part < H ? 'head' : 'MLP'), el('button', {type: 'button', onclick: () => change({ablated: null})}, 'put it back'));
  }
}

const topGuesses = p => Array.from({length: SHAPE['logit.top'][2]}, (_, k) => {
  const id = at('logit.top', L, p, k);
  return {label: visible(tokenText(id)), value: topProbability('logit', L, p, k), right: p < T - 1 && id === at('target', p)};
});

function aboutToken(index) {
  if (index === 0) return ['The first token: nothing comes before it, so it was not guessed.'];
  const p = index - 1;
  const head = p === T - 1
    ? 'What the model would write next:'
    : `token ${index} ‘${visible(targetText(p))}’\nloss ${at('loss', p).toFixed(3)} nats · ${percent(at('logit.right', L, p))} · rank ${at('logit.rank', L, p)}`;
  return [el('div', {}, head), bars(topGuesses(p), {limit: 1, format: percent})];
}

function drawChosen() {
  const {p} = state;
  const before = FACTS.shown.slice(Math.max(0, p - 15), p + 1).join('');
  const last = p === T - 1;
  const brief = last ? '' : ` ${at('loss', p).toFixed(3)} nats, ${percent(at('logit.right', L, p))}, rank ${at('logit.rank', L, p)}`;
  $('chosen').replaceChildren(
    el('summary', {}, el('h2', {}, last ? 'After the text' : ['Token ', String(p + 1), ': ', quoted(targetText(p))]), el('span', {class: 'brief'}, brief)),
    el('p', {class: 'soft'}, 'guessed after ', quoted((p > 15 ? '…' : '') + before)),
    last ? '' : el('p', {}, el('span', {class: 'figure', id: 'chosen-loss'}, at('loss', p).toFixed(3)), ' nats of loss: the model gave it ', el('b', {id: 'chosen-probability'}, percent(at('logit.right', L, p))), ', rank ', el('b', {id: 'chosen-rank'}, String(at('logit.rank', L, p))), ` of ${FACTS.vocabulary.toLocaleString('en')}.`),
    state.ablated && !last ? el('p', {}, `Without ${partName(state.ablated.layer, state.ablated.part)}: ${at('loss', p).toFixed(3)} → `, el('b', {id: 'chosen-without'}, (at('loss', p) + at('ablation', state.ablated.layer, state.ablated.part, p)).toFixed(3)), ' nats') : '',
    el('div', {id: 'chosen-top'}, bars(topGuesses(p), {limit: 1, format: percent})));
}

function drawView() {
  for (const tab of $('tabs').children) {
    const here = tab.dataset.view === state.view;
    tab.setAttribute('aria-selected', String(here));
    tab.tabIndex = here ? 0 : -1;
  }
  const panel = $('view');
  const scrolled = scrollY;
  const focused = panel.contains(document.activeElement) && document.activeElement.id;
  panel.style.minHeight = `${panel.offsetHeight}px`;
  panel.replaceChildren();
  panel.setAttribute('aria-label', VIEWS[state.view][0]);
  VIEWS[state.view][1](panel);
  panel.style.minHeight = '';
  if (focused && $(focused)) $(focused).focus({preventScroll: true});
  scrollTo({top: scrolled, behavior: 'instant'});
}

function listen() {
  $('theme').onclick = () => setTheme(isDark() ? 'light' : 'dark');
  themeListeners.push(() => change({}));
  $('help').onclick = () => $('guide').showModal();
  $('keys').append(...Object.entries(KEYS).flatMap(([key, what]) => [el('dt', {}, key), el('dd', {}, what)]));
  $('tokens').addEventListener('click', event => {
    const token = event.target.closest('.token');
    if (token && token.dataset.token > 0) change({p: Number(token.dataset.token) - 1});
  });
  $('tokens').addEventListener('mousemove', event => {
    const token = event.target.closest('.token');
    if (token) tipAt(event, ...aboutToken(Number(token.dataset.token)));
    else hideTip();
  });
  $('tokens').addEventListener('mouseleave', hideTip);
  Object.entries(VIEWS).forEach(([name, [title]], i) => {
    $('tabs').append(el('button', {type: 'button', role: 'tab', 'data-view': name, title: `${title} (${i + 1})`, onclick: () => change({view: name})}, title));
  });
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey || $('guide').open || /^(SELECT|INPUT|TEXTAREA)$/.test(event.target.tagName)) return;
    const views = Object.keys(VIEWS);
    const keys = {
      ArrowLeft: () => change({p: state.p - 1}),
      ArrowRight: () => change({p: state.p + 1}),
      h: () => change({head: (state.head + H - 1) % H}),
      l: () => change({head: (state.head + 1) % H}),
      a: () => has('ablation') && toggleAblation(state.layer, state.head),
      t: () => $('theme').click(),
      '?': () => $('guide').showModal(),
      Escape: hideTip,
    };
    if (event.target.id === 'heads') {
      keys.ArrowUp = () => change({layer: (state.layer + L - 1) % L});
      keys.ArrowDown = () => change({layer: (state.layer + 1) % L});
    }
    views.forEach((view, i) => { keys[i + 1] = () => change({view}); });
    if (event.target.getAttribute('role') === 'tab' && /^Arrow(Left|Right)$/.test(event.key)) {
      const next = (views.indexOf(state.view) + (event.key === 'ArrowRight' ? 1 : views.length - 1)) % views.length;
      change({view: views[next]});
      $('tabs').children[next].focus();
    } else if (keys[event.key]) {
      keys[event.key]();
    } else return;
    event.preventDefault();
  });
  let waiting;
  addEventListener('resize', () => { clearTimeout(waiting); waiting = setTimeout(() => { drawText(); drawView(); }, 120); });
}

async function modelPage() {
  $('title').textContent = FACTS.title;
  $('title').title = FACTS.path;
  const narrow = matchMedia('(max-width: 860px)');
  const fold = () => { $('chosen').open = !narrow.matches; };
  narrow.addEventListener('change', fold);
  fold();
  $('about').textContent = `${FACTS.parameters.toLocaleString('en')} parameters · ${L} ${L === 1 ? 'layer' : 'layers'} · ${H} ${H === 1 ? 'head' : 'heads'} · width ${FACTS.width} · ${FACTS.vocabulary.toLocaleString('en')} tokens (${FACTS.tokenizer})`;
  await painted();
  try {
    await unpackArrays();
  } catch (error) {
    $('view').append(el('p', {class: 'failed'}, `The data of this page cannot be unpacked: ${error}. A browser of 2023 or later is needed.`));
    return;
  }
  // First a right guess that the early layers were far from, with some text before it, and the head
  // that looks most at the token before.
  const far = p => p < T / 4 || at('logit.rank', L, p) > 1 ? 0 : at('logit.rank', Math.floor(L / 2), p) + at('logit.rank', 0, p) / FACTS.vocabulary;
  const distances = textLosses().map((_, p) => far(p));
  state.p = distances.indexOf(Math.max(...distances));
  if (L) {
    const values = Array.from({length: L * H}, (_, i) => has('score.previous') ? at('score.previous', Math.floor(i / H), i % H) : 0);
    const best = values.indexOf(Math.max(...values));
    [state.layer, state.head] = [Math.floor(best / H), best % H];
  }
  readAddress();
  listen();
  change({});
}
