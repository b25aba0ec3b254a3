/** What a manifest must say so that its prefix can be bound: keys and values before the text of a decoder. */
import { brief, expect } from './errors.mjs';

const FOLDED = '`prefixkit export --onnx` folds a prompt into them: use the prefix.safetensors of its folder';

/** Throws unless the tensors are what the manifest says, and that is what this reader knows. */
export function checkManifest(manifest, tensors, where) {
  const { schema, backbone, injections, task, provenance } = manifest;
  expect(Number.isSafeInteger(schema) && schema > 0, `${where} manifest`, 'a schema number', schema);
  expect(schema === 1, where, 'schema 1', schema, 'take the prefix.mjs of a newer release');
  const stacks = Object.keys(backbone?.stacks ?? {}).join(' and ');
  const decoder = backbone?.stacks?.decoder;
  const layered = stacks === 'decoder' && Array.isArray(decoder) && decoder.length > 0;
  expect(layered, where, 'a prefix for a decoder alone', stacks ? `one for ${stacks}` : 'no geometry');
  const record = onlyRecord(injections, where);
  const start = record.positions?.text_start;
  const within = Number.isSafeInteger(start) && start >= 0 && start < (backbone.context_length ?? Infinity);
  expect(within, `${where} manifest`, 'a text_start within the context', start);
  checkTensors(decoder, record.length, tensors, where);
  checkNamed(backbone, provenance, `${where} manifest`);
  if (task !== undefined) checkTask(task, `${where} task`);
}

function checkNamed(backbone, provenance, where) {
  expect(typeof backbone.name === 'string', where, "text as the backbone's name", backbone.name);
  for (const level of ['config_hash', 'weights_hash', 'tokenizer_hash']) {
    const hash = backbone[level] ?? '';
    expect(typeof hash === 'string', where, `text or nothing as the backbone's ${level}`, hash);
  }
  for (const name of ['method', 'prefixkit']) {
    expect(typeof provenance?.[name] === 'string', where, `a provenance with ${name}`, provenance?.[name]);
  }
  const { metrics = {} } = provenance;
  const named = metrics !== null && typeof metrics === 'object' && !Array.isArray(metrics);
  expect(named, where, 'an object as metrics', metrics);
}

function onlyRecord(injections, where) {
  const records = Array.isArray(injections) ? injections : [];
  const place = (record) => [record?.kind, record?.stack, record?.attention].map(brief).join(' ');
  const found = records.map((record) => brief(record?.kind)).join(' and ') || 'nothing';
  const keysAndValues = records.length === 1 && place(records[0]) === 'key_value_prefix decoder self';
  const step = found === 'embedding_prompt' ? FOLDED : '';
  expect(keysAndValues, where, 'keys and values before the text of a decoder', found, step);
  const [record] = records;
  expect((record.placement ?? 'prepend') === 'prepend', where, 'keys and values before the text', record.placement);
  return record;
}

function checkTensors(layers, length, tensors, where) {
  const wanted = new Map();
  layers.forEach((layer, n) => {
    wanted.set(`decoder.self.layers.${n}.key`, [layer?.kv_heads, length, layer?.key_dim]);
    wanted.set(`decoder.self.layers.${n}.value`, [layer?.kv_heads, length, layer?.value_dim]);
  });
  for (const name of tensors.keys()) expect(wanted.has(name), where, 'no tensors but keys and values', name);
  for (const [name, shape] of wanted) {
    const found = tensors.get(name)?.shape ?? [];
    const equal = found.length === 3 && found.every((size, axis) => size > 0 && size === shape[axis]);
    const expected = `shape [${shape.map(brief).join(', ')}]`;
    expect(equal, `${where} tensor ${name}`, expected, found.length ? `[${found.join(', ')}]` : 'none');
  }
  const dtypes = [...new Set([...tensors.values()].map(({ dtype }) => dtype))];
  expect(dtypes.length === 1, where, 'one dtype for all keys and values', dtypes.join(' and '));
}

function checkTask(task, where) {
  for (const name of ['name', 'input_template', 'separator', 'target_template']) {
    expect(typeof task?.[name] === 'string', where, `text as ${name}`, typeof task?.[name]);
  }
  expect(['none', 'before', 'after'].includes(task.bos), where, 'bos none, before or after', task.bos);
  const stops = Array.isArray(task.stop) && task.stop.every((token) => typeof token === 'string');
  expect(stops, where, 'a list of texts as stop', typeof task.stop);
  expect(Number.isSafeInteger(task.max_length) && task.max_length > 0, where, 'a max_length from 1', task.max_length);
}
