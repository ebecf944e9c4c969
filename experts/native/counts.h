// What a router counts, in words that Python reads; experts/dispatch/stats.py has the same layout.

#pragma once

#include <stdint.h>

struct Histogram {
    enum { NUM_BOUNDS = 15 };
    int64_t sum_ns, count, buckets[NUM_BOUNDS + 1];

    void add(int64_t duration_ns) {
        static const int64_t BOUNDS_US[NUM_BOUNDS] = {10,    20,     50,     100,     200,     500,    1000,   2000,
                                                      5000, 10000, 50000, 100000, 500000, 1000000, 5000000};
        int bucket = 0;
        while (bucket < NUM_BOUNDS && duration_ns > BOUNDS_US[bucket] * 1000) bucket++;
        sum_ns += duration_ns;
        count++;
        buckets[bucket]++;
    }
};

struct RouterCounts {
    int64_t fan_out_sum, bytes_sent, bytes_received, last_success_ns;
    Histogram plan_pack, wait, combine;
};
