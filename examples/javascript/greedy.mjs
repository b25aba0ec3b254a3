/** Greedy writing on any of the runtimes that have an ort.InferenceSession. */
import { textFeeds } from './prefix.mjs';

/**
 * Gives the likeliest token after another, until one of `stop` (which is not given) or `most` of them.
 * @param session of a portable graph
 * @param Tensor the class of its runtime
 * @param {{past: object, before: number, position: number, ids: number[], stop: number[], most: number}} row what
 *   `pastFeeds` or `emptyPast` gives, its slots, the position of the first token, the prompt, and where the answer ends
 */
export async function* greedy(session, Tensor, { past, before, position, ids, stop, most }) {
  let [feeds, next] = [past, ids];
  for (let written = 0; written < most; written++) {
    const text = textFeeds([next], Tensor, { past: before, position });
    if (!session.inputNames.includes('position_ids')) delete text.position_ids;
    const { logits, ...present } = await session.run({ ...feeds, ...text });
    const token = likeliest(logits);
    if (stop.includes(token)) return;
    yield token;
    feeds = asPast(present);
    [before, position, next] = [before + next.length, position + next.length, [token]];
  }
}

/** The outputs of a step as the inputs of the next one. */
function asPast(present) {
  const renamed = ([name, tensor]) => [name.replace('present', 'past_key_values'), tensor];
  return Object.fromEntries(Object.entries(present).map(renamed));
}

function likeliest({ data, dims }) {
  const last = data.subarray(data.length - dims.at(-1));
  return last.reduce((best, score, token) => (score > last[best] ? token : best), 0);
}
