// The time loop of a persistent scan; include persistent_product.cuh first.

template <class Cell>
__device__ __forceinline__ void copy_and_multiply(
    const Cell& cell, const Step& step, unsigned char* buffers, const Sequence* sequences,
    Weights& weights, Sums& sums) {
    const auto row_of = [&](const Sequence& sequence) { return cell.operand(sequence, step); };
    copy_rows(buffers, 0, sequences, cell.K(), row_of);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        // Beside the next chunk the weights may be on their way that were asked for during the one before.
        constexpr int WEIGHTS = STREAMED < RING ? STREAMED : RING;
        if (chunk + 1 < CHUNKS)
            copy_rows(buffers + (chunk + 1) % 2 * BUFFER, chunk + 1, sequences, cell.K(), row_of);
        if (chunk == 0) copy_wait<(CHUNKS > 1)>();
        else if (chunk + 1 < CHUNKS) copy_wait<1 + WEIGHTS>();
        else copy_wait<WEIGHTS>();
        __syncthreads();
        add_product(cell, weights, chunk, buffers + chunk % BUFFERS * BUFFER, sums);
        if (chunk + 2 < CHUNKS) __syncthreads();  // all have read the buffer that the next copy goes to
    }
}

// Calls act(e, item) for each item that this thread has; unrolled, so that what a cell keeps for e is a
// register.
template <class Act>
__device__ __forceinline__ void for_items(const Scan& scan, const Sequence* sequences, Act act) {
#pragma unroll
    for (int e = 0; e < ITEMS; ++e) {
        const Item item = item_of(e, scan, sequences);
        if (item.exists) act(e, item);
    }
}

// Runs step `step`; false where a block did not come.
template <class Cell>
__device__ __forceinline__ bool run_step(
    Cell& cell, const Scan& scan, const Step& step, unsigned char* buffers, float* shared_sums,
    const Sequence* sequences, Weights& weights) {
    for_items(scan, sequences, [&](int e, const Item& item) {
        if (item.has(step.t)) cell.fetch(e, item, step.t);
    });
    Sums sums = {};
    if (GRID) {
        if (step.count > 0 && !all_have_done(scan, step.count)) return false;
        copy_and_multiply(cell, step, buffers, sequences, weights, sums);
    } else {
        add_product(cell, weights, 0, buffers, sums);
    }
    store_sums(sums, shared_sums);
    __syncthreads();
    for_items(scan, sequences, [&](int e, const Item& item) {
        cell.advance(e, item, step, Totals{shared_sums + item.n * SUMS_PITCH});
    });
    if (GRID) tell_done(scan, step.count + 1);
    else __syncthreads();
    for_items(scan, sequences, [&](int e, const Item& item) {
        if (item.has(step.t)) cell.save(e, item, step.t);
        else if (step.exists) cell.pad(item, step.t);
    });
    return true;
}

template <class Cell>
__device__ __forceinline__ void run(Cell& cell, const Scan& scan) {
    SHARED(unsigned char, buffers);
    Weights weights;
    weights.shared = reinterpret_cast<Four*>(buffers + BUFFERS * BUFFER);
    weights.ring = weights.shared + SHARED_WEIGHTS;
    float* const shared_sums = reinterpret_cast<float*>(weights.ring + RING * SLOT);
    Sequence* const sequences = reinterpret_cast<Sequence*>(shared_sums + WARPS_K * SEQUENCES * SUMS_PITCH);
    choose_sequences(scan, sequences);
    __syncthreads();
    int steps = 0;  // of the longest
    for (int n = 0; n < SEQUENCES; ++n) steps = sequences[n].length > steps ? sequences[n].length : steps;

    cell.buffer = buffers;
    if (!GRID) {
        const auto row_of = [&](const Sequence& sequence) { return cell.initial(sequence); };
        copy_rows(buffers, 0, sequences, cell.K(), row_of);
        copy_wait<0>();
        __syncthreads();
    }
    weights.load(cell);
#if STREAMED
    weights.start(cell);
#endif
    for_items(scan, sequences, [&](int e, const Item& item) { cell.begin(e, item); });
    // A way back ends with the product of the last gradients, which goes to the initial state.
    const int iterations = steps && Cell::BACKWARD ? steps + 1 : steps;
    const bool falling = scan.reverse != Cell::BACKWARD;
    bool failed = false;
    for (int count = 0; count < iterations && !failed; ++count) {
        const int t = falling ? steps - 1 - count : count;
        const Step step = {count, t, falling ? t + 1 : t - 1, count < steps};
        failed = !run_step(cell, scan, step, buffers, shared_sums, sequences, weights);
    }
    if (STREAMED) copy_wait<0>();  // for a step that there is not: shared memory must not outlive the block
    if (failed) return;
    for_items(scan, sequences, [&](int e, const Item& item) {
        cell.end(e, item);
        for (int t = steps; t < scan.T; ++t) cell.pad(item, t);
    });
}
