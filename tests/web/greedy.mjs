// `node greedy.mjs FOLDER PROMPTS NEW_TOKENS`: greedy continuations by transformers.js on the CPU, alone and as one
// left-padded batch. PROMPTS is a JSON list of texts; prints {device, alone, batch, text}.
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, prompts, newTokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
tokenizer.padding_side = "left";
// Everything else is what the folder's config.json says.
const model = await AutoModelForCausalLM.from_pretrained(name, { device: "cpu" });

async function continued(texts) {
  const inputs = tokenizer(texts, { padding: true, add_special_tokens: false });
  const length = inputs.input_ids.dims[1];
  const options = { max_new_tokens: Number(newTokens), do_sample: false };
  const output = await model.generate({ ...inputs, ...options });
  return output.tolist().map((row) => row.slice(length).map(Number));
}

const texts = JSON.parse(prompts);
const alone = [];
for (const text of texts) alone.push((await continued([text]))[0]);
const batch = await continued(texts);
const text = alone.map((ids) => tokenizer.decode(ids, { skip_special_tokens: true }));
console.log(JSON.stringify({ alone, batch, text }));
