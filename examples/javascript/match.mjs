/** Whether a prefix was made for the model in an exported folder: schemas/README.md, section 4. */
import { brief, expect } from './errors.mjs';

/** Whether the prefix was made for the weights with this hash; false where either is unknown. */
export function matches(prefix, backboneHash) {
  return backboneHash != null && prefix.manifest.backbone.weights_hash === backboneHash;
}

/**
 * Refuses a prefix that was made for another model than an exported folder holds, and a graph that cannot take one.
 * @param {object} report the content of export.json
 * @returns {'weights' | 'config' | 'geometry'} the deepest level that was compared and is equal
 * @throws {PrefixError} in one line, the level and what differs
 */
export function refuseOther({ manifest }, report) {
  const { backbone, injections } = manifest;
  const where = `prefix for ${brief(backbone.name)} on ${brief(report.backbone?.name)}`;
  const step = 'export again with `prefixkit export --onnx`, in float32 or float16';
  const takes = report.graph?.inputs?.past_key_names && !report.buffered && !report.reader && !report.prefix?.baked;
  expect(takes, where, 'a portable graph that takes a prefix', 'another', step);
  expect(report.graph.dtype !== 'bfloat16', where, 'keys and values that JavaScript has', 'bfloat16', step);
  const { length, positions } = injections[0];
  const counts = 'position_ids' in report.graph.inputs || positions.text_start === length;
  expect(counts, where, `text that starts at ${length}, as the graph counts`, positions.text_start);
  return deepestEqual(where, facts(backbone), facts(report.backbone));
}

/** What is known of a backbone: level, name and fact. */
function facts({ stacks, hidden_size: hidden, family, vocab_size: vocabulary, ...hashes }) {
  const layers = stacks.decoder ?? [];
  const shape = (layer) => `${layer.kv_heads} heads of ${layer.key_dim} and ${layer.value_dim}`;
  const window = (layer) => (layer.window ? `window ${brief(layer.window)}` : 'full attention');
  return [
    ['geometry', 'stacks', Object.keys(stacks).sort().join(' and ')],
    ['geometry', 'layers', layers.length],
    ['geometry', 'hidden size', hidden],
    ...layers.map((layer, n) => ['geometry', `layer ${n}`, shape(layer)]),
    ['config', 'architecture', family],
    ['config', 'vocabulary', vocabulary],
    ...layers.map((layer, n) => ['config', `layer ${n}`, window(layer)]),
    ...['config', 'weights', 'tokenizer'].map((level) => [level, `${level} hash`, hashes[`${level}_hash`]]),
  ];
}

function deepestEqual(where, wanted, found) {
  let reached = 'geometry';
  wanted.forEach(([level, name, ours], index) => {
    const theirs = found[index][2];
    if (ours == null || theirs == null) return;
    const what = level === 'tokenizer' ? 'tokenizer.json of training' : 'backbone that the prefix was trained on';
    expect(ours === theirs, where, `${name} ${brief(ours)}`, `${brief(theirs)} (checked ${level})`, `use the ${what}`);
    if (name.endsWith('hash') && level !== 'tokenizer') reached = level;
  });
  return reached;
}
