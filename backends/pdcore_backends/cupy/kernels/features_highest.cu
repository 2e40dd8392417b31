// The largest log feature of each chunk's real keys, chunk c in entry c.
__global__ void __launch_bounds__(THREADS, 2)
    features_highest(INPUTS, scalar* __restrict__ tops, Shape shape, Chunks cut) {
  constexpr int ACROSS = 32, DOWN = THREADS / ACROSS;
  __shared__ scalar found[THREADS];
  const int tiles = (shape.dim + ACROSS - 1) / ACROSS;
  const int f = int(blockIdx.x % tiles) * ACROSS + int(threadIdx.x) % ACROSS;
  const int chunk = int(blockIdx.x / tiles % cut.key_count);
  const i64 pair = blockIdx.x / tiles / cut.key_count;  // of a sequence and a key head
  const Inputs inputs = INPUT_NAMES;
  const Head head = head_at(inputs, shape, pair / shape.heads, pair % shape.heads, 0);
  const int last = int(smaller((chunk + i64(1)) * cut.key_size, shape.keys));
  scalar top = MINUS_INFINITY;
  if (f < shape.dim)
    for (int key = chunk * cut.key_size + int(threadIdx.x) / ACROSS; key < last; key += DOWN)
      if (!head.key_mask || head.key_mask[key])
        top = larger(top, Stored<k_type>::read(head.k.first[key * head.k.pitch + f]));
  found[threadIdx.x] = top;
  __syncthreads();
  if (int(threadIdx.x) >= ACROSS || f >= shape.dim) return;
  for (int i = 1; i < DOWN; i++) top = larger(top, found[int(threadIdx.x) + ACROSS * i]);
  tops[(pair * (cut.key_count + 1) + chunk) * shape.dim + f] = top;
}
