/* Stands for NVIDIA's pyxis in tests: accepts the options of srun that we use, runs the task on the host
 * and shows it each option's value as FAKE_PYXIS_NAME. */
#include <ctype.h>
#include <slurm/spank.h>
#include <stdio.h>

SPANK_PLUGIN(fake_pyxis, 1);

enum { NUM_OPTIONS = 4, LONGEST = 8192 };
static const char *names[NUM_OPTIONS] = {"container-image", "container-env", "container-mounts", "container-workdir"};
static char values[NUM_OPTIONS][LONGEST];

static int keep(int number, const char *value, int is_remote) {
    (void)is_remote;
    snprintf(values[number], LONGEST, "%s", value ? value : "");
    return 0;
}

int slurm_spank_init(spank_t plugin, int count, char **words) {
    (void)count, (void)words;
    for (int i = 0; i < NUM_OPTIONS; i++) {
        struct spank_option option = {(char *)names[i], "VALUE", "stand-in of pyxis", 1, i, keep};
        if (spank_option_register(plugin, &option) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}

int slurm_spank_task_init(spank_t plugin, int count, char **words) {
    (void)count, (void)words;
    for (int i = 0; i < NUM_OPTIONS; i++) {
        char name[64];
        if (!values[i][0])
            continue;
        snprintf(name, sizeof name, "FAKE_PYXIS_%s", names[i]);
        for (char *c = name; *c; c++)
            *c = *c == '-' ? '_' : (char)toupper(*c);
        if (spank_setenv(plugin, name, values[i], 1) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}
