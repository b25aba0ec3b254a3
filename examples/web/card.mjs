/** The card of a prefix: what its file says of itself. Everything in it is text, never markup. */

const BARE =
  'The model alone goes on from the input as the novels and records that it has read; no task was shown to it.';

/** How the menu calls a prefix: the name of its task, else of its file. */
export const title = ({ task }, file) => task?.name ?? file.replace(/\.safetensors$/, '');

/** The small line below: how long it is, how large, and whether it says what it was made for. */
export const hint = ({ injections, backbone }, size) =>
  `${injections[0].length} slots, ${kilobytes(size)}${backbone.weights_hash ? '' : ', weights unknown'}`;

/** Fill the card's elements from a manifest; without one it describes the bare model. */
export function card({ title: heading, says, rows }, manifest, size, file) {
  heading.textContent = manifest ? title(manifest, file) : 'No prefix';
  says.textContent = manifest ? file : BARE;
  rows.replaceChildren(...(manifest ? facts(manifest, size).flatMap(row) : []));
}

function facts({ task, backbone, injections, provenance, content }, size) {
  const { method, seed, data_hash: data, metrics, prefixkit } = provenance;
  const { steps, ...measured } = metrics ?? {};
  const shown = [
    ['method', method],
    ['length', `${injections[0].length} slots, ${backbone.stacks.decoder.length} layers`],
    ['size', kilobytes(size)],
    ['made for', backbone.name],
    ['weights hash', backbone.weights_hash ? short(backbone.weights_hash) : 'unknown'],
    ['asked as', task && spelled(`${task.input_template}${task.separator}`)],
    ['data hash', data && short(data)],
    ['trained', steps && `${steps} steps, seed ${seed}`],
    ...Object.entries(measured).map(([name, value]) => [name.replaceAll('_', ' '), rounded(value)]),
    ['by', prefixkit && `prefixkit ${prefixkit}`],
    ['digest', content && short(content)],
  ];
  return shown.filter(([, value]) => value !== undefined && value !== '');
}

function row([name, value]) {
  const element = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });
  return [element('dt', name), element('dd', value)];
}

const kilobytes = (bytes) => `${Math.round(bytes / 1000).toLocaleString('en')} kB`;
const rounded = (value) =>
  typeof value === 'number' && !Number.isInteger(value) ? value.toPrecision(4) : String(value);
const short = (hash) => String(hash).replace(/^(.*:)?([0-9a-f]{12})[0-9a-f]+$/, '$2…');
const spelled = (template) => template.trim().replaceAll('\n', '⏎');
