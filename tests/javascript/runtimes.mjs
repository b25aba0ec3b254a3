/** The same prefix on three runtimes: what PyTorch computes, and something else without it. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import * as transformers from '@huggingface/transformers';
import * as node from 'onnxruntime-node';
import * as web from 'onnxruntime-web';
import { greedy } from '../../examples/javascript/greedy.mjs';
import * as bridge from '../../examples/javascript/prefix.mjs';
import { apart, cases, json } from './cases.mjs';

const [TOLERANCE, EFFECT] = [1e-3, 1];
transformers.env.allowRemoteModels = false;
web.env.wasm.numThreads = 1;

const RUNTIMES = {
  'onnxruntime-node': { Tensor: node.Tensor, open: openOnNode },
  'onnxruntime-web': { Tensor: web.Tensor, open: openAsBrowsersDo },
};

function openOnNode(folder) {
  return node.InferenceSession.create(`${folder}/onnx/model.onnx`);
}

function openAsBrowsersDo(folder) {
  const path = 'model.onnx.data';
  const [graph, data] = ['model.onnx', path].map((name) => readFileSync(`${folder}/onnx/${name}`));
  return web.InferenceSession.create(graph, { executionProviders: ['wasm'], externalData: [{ path, data }] });
}

const loaded = (stored) => bridge.readPrefix(readFileSync(stored.file));
const inputs = (rows, Tensor, prefix) =>
  bridge.textFeeds(rows, Tensor, prefix ? { past: bridge.slots(prefix), position: bridge.textStart(prefix) } : {});
const quiet = { lost: () => {} };

async function logits(session, Tensor, { rows, folder }, prefix) {
  const batch = rows.length;
  const report = json(`${folder}/export.json`);
  const empty = () => bridge.emptyPast(report, Tensor, { batch });
  const past = prefix ? bridge.pastFeeds(prefix, Tensor, { ...quiet, batch }) : empty();
  return (await session.run({ ...past, ...inputs(rows, Tensor, prefix) })).logits.data;
}

async function written(session, Tensor, { rows: [ids], bare: { greedy: { length: most } }, folder }, prefix) {
  const report = json(`${folder}/export.json`);
  const past = prefix ? bridge.pastFeeds(prefix, Tensor, quiet) : bridge.emptyPast(report, Tensor);
  const [before, position] = prefix ? [bridge.slots(prefix), bridge.textStart(prefix)] : [0, 0];
  const tokens = [];
  const row = { past, before, position, ids, stop: [], most };
  for await (const token of greedy(session, Tensor, row)) tokens.push(token);
  return tokens;
}

for (const family of cases.families) {
  for (const [runtime, { Tensor, open }] of Object.entries(RUNTIMES)) {
    test(`${runtime}, ${family.family}`, async (context) => {
      const session = await open(family.folder);
      const bare = await logits(session, Tensor, family, null);
      assert.ok(apart(bare, family.bare.logits) <= TOLERANCE);
      assert.deepEqual(await written(session, Tensor, family, null), family.bare.greedy);
      for (const [dtype, stored] of Object.entries(family.prefixes)) {
        const prefix = loaded(stored);
        const found = await logits(session, Tensor, family, prefix);
        const [error, effect] = [apart(found, stored.logits), apart(bare, stored.logits)];
        context.diagnostic(`${dtype} error ${error.toExponential(1)} effect ${effect.toFixed(1)}`);
        assert.ok(error <= TOLERANCE, `${error}`);
        // Without the prefix the comparison fails.
        assert.ok(effect > EFFECT, `${effect}`);
        assert.deepEqual(await written(session, Tensor, family, prefix), stored.greedy);
      }
    });
  }

  test(`transformers.js, ${family.family}`, async (context) => {
    const { Tensor, AutoModelForCausalLM } = transformers;
    const behind = (rows) => bridge.generateInputs(prefix, rows, transformers);
    const model = await AutoModelForCausalLM.from_pretrained(family.folder, { dtype: 'fp32', local_files_only: true });
    const [stored, prefix] = [family.prefixes.F32, loaded(family.prefixes.F32)];
    const { logits: found } = await model({ ...behind(family.rows), ...inputs(family.rows, Tensor, prefix) });
    const error = apart(found.data, stored.logits);
    context.diagnostic(`error ${error.toExponential(1)}`);
    assert.ok(error <= TOLERANCE, `${error}`);
    const [first] = family.rows;
    const write = async (given) => {
      const options = { max_new_tokens: stored.greedy.length, do_sample: false };
      const [all] = (await model.generate({ ...given, ...options })).tolist();
      return all.slice(first.length).map(Number);
    };
    const ended = (tokens) => (tokens.includes(0) ? tokens.slice(0, tokens.indexOf(0) + 1) : tokens);
    assert.deepEqual(await write(behind([first])), ended(stored.greedy));
    const { input_ids, attention_mask } = inputs([first], Tensor, null);
    assert.deepEqual(await write({ input_ids, attention_mask }), ended(family.bare.greedy));
    assert.notDeepEqual(ended(stored.greedy), ended(family.bare.greedy));
    const { manifest, tensors } = structuredClone(prefix);
    manifest.injections[0].positions = { text_start: 0, prefix_takes_positions: false };
    const elsewhere = () => bridge.generateInputs({ manifest, tensors }, [first], transformers);
    assert.throws(elsewhere, /text that starts at 6, right behind the prefix, .* found text that starts at 0/);
  });

  test(`a prefix for other weights is refused, ${family.family}`, () => {
    const report = json(`${family.folder}/export.json`);
    const prefix = loaded(family.prefixes.F32);
    const other = loaded({ file: family.other });
    const hash = report.backbone.weights_hash;
    assert.equal(bridge.refuseOther(prefix, report), 'weights');
    assert.ok(bridge.matches(prefix, hash));
    assert.ok(!bridge.matches(other, hash) && !bridge.matches(prefix, undefined));
    const said = /expected weights hash b3t-v1:0+; found b3t-v1:.* \(checked weights\); use the backbone/;
    assert.throws(() => bridge.refuseOther(other, report), said);
    const changed = (part, change) => ({ ...report, [part]: { ...report[part], ...change } });
    for (const [given, reason] of [
      [changed('backbone', { hidden_size: 65 }), /hidden size 64; found 65 \(checked geometry\)/],
      [changed('backbone', { vocab_size: 9 }), /vocabulary 320; found 9 \(checked config\)/],
      [changed('backbone', { tokenizer_hash: 'b3-v1:0' }), /\(checked tokenizer\); use the tokenizer.json of training/],
      [changed('graph', { dtype: 'bfloat16' }), /keys and values that JavaScript has; found bfloat16/],
      [changed('graph', { inputs: {} }), /a portable graph that takes a prefix; found another; export again/],
      [changed('prefix', { baked: true }), /a portable graph that takes a prefix/],
    ]) {
      assert.throws(() => bridge.refuseOther(prefix, given), reason);
    }
    assert.equal(bridge.refuseOther(prefix, changed('backbone', { weights_hash: undefined })), 'config');
  });
}
