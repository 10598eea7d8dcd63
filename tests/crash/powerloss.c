/* A power-loss recorder, loaded with LD_PRELOAD: notes what is durable of a directory tree.
 *
 * POWERLOSS_ROOT  the tree (absolute, no symbolic links)
 * POWERLOSS_LOG   where to append what becomes durable; powerloss.py rebuilds a tree from it
 *
 * The strictest reading of POSIX: a file's bytes are durable when the file is synced, a name is
 * durable when its directory is synced, and nothing else ever is. In particular a synced file
 * without a synced name is lost, and a name without a synced file is an empty file.
 *
 * The log starts with the whole tree as the first process found it (that is durable), followed by
 * one record per sync: for a file the ranges written since its last sync, for a directory its
 * entries. A later process with the same log (after a kill without power loss) goes on with it. A
 * record is on the log before the sync returns; one that is cut off by kill -9 is ignored, since
 * then its sync did not return. Real syncs are not made: the machine stays up.
 *
 * Files are told apart by inode number and time of birth, because numbers are used again. Writes
 * through a memory map, and by several processes to one file, are not seen.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAGIC 0x31474f4c53534f4cull
#define WHOLE_BELOW (64 << 10) /* Files up to this size are copied whole at each sync. */
#define FD_MAX 65536

typedef struct { uint64_t inode, birth; } Id;
typedef struct { uint64_t start, stop; } Range;

/* What one file has had written to it since its last sync. */
typedef struct File {
    struct File *next;
    Id id;
    int inside; /* Whether it is in the tree; if not, nothing is noted. */
    int whole;  /* Copy everything: what was written is not known. */
    uint64_t size_min;
    Range *ranges;
    size_t count, capacity;
} File;

/* A record being built. */
typedef struct { char *data; size_t size, capacity; } Buffer;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static File *buckets[4096];
static File *of_descriptor[FD_MAX];
static char root[4096];
static size_t root_length;
static int log_descriptor = -1;
static int continuing; /* An earlier process may have left writes that it did not sync. */

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off64_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static ssize_t (*real_pwritev)(int, const struct iovec *, int, off64_t);
static ssize_t (*real_pwritev2)(int, const struct iovec *, int, off64_t, int);
static int (*real_ftruncate)(int, off64_t);
static int (*real_truncate)(const char *, off64_t);
static int (*real_fallocate)(int, int, off64_t, off64_t);
static int (*real_posix_fallocate)(int, off64_t, off64_t);
static ssize_t (*real_sendfile)(int, int, off64_t *, size_t);
static ssize_t (*real_copy_file_range)(int, off64_t *, int, off64_t *, size_t, unsigned);
static int (*real_openat)(int, const char *, int, ...);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);

static void fail(const char *what) {
    dprintf(2, "powerloss: %s: %s\n", what, strerror(errno));
    abort();
}

static void lock(void) { pthread_mutex_lock(&mutex); }
static void unlock(void) { pthread_mutex_unlock(&mutex); }

/* ---- records ---- */

static void put(Buffer *buffer, const void *data, size_t size) {
    if (buffer->size + size > buffer->capacity) {
        buffer->capacity = (buffer->size + size) * 2;
        buffer->data = realloc(buffer->data, buffer->capacity);
        if (!buffer->data) fail("out of memory");
    }
    memcpy(buffer->data + buffer->size, data, size);
    buffer->size += size;
}

static void put_u64(Buffer *buffer, uint64_t value) { put(buffer, &value, 8); }
static void put_id(Buffer *buffer, Id id) { put_u64(buffer, id.inode); put_u64(buffer, id.birth); }

static void begin(Buffer *buffer, char type, Id id) {
    memset(buffer, 0, sizeof *buffer);
    put_u64(buffer, MAGIC);
    put_u64(buffer, 0); /* The record's size, filled in at the end. */
    put_u64(buffer, (uint64_t)type);
    put_id(buffer, id);
}

static void end(Buffer *buffer) {
    uint64_t size = buffer->size;
    memcpy(buffer->data + 8, &size, 8);
    for (size_t done = 0; done < buffer->size;) {
        ssize_t n = real_write(log_descriptor, buffer->data + done, buffer->size - done);
        if (n < 0) fail("cannot write the log");
        done += (size_t)n;
    }
    free(buffer->data);
}

/* ---- files ---- */

/* Who a file is; returns its type (S_IFMT bits), or 0 if there is none. */
static mode_t identify(int directory, const char *name, int flags, Id *id, uint64_t *size) {
    struct statx status;
    if (statx(directory, name, flags, STATX_TYPE | STATX_INO | STATX_SIZE | STATX_BTIME, &status))
        return 0;
    mode_t type = status.stx_mode & S_IFMT;
    if ((type == S_IFREG || type == S_IFDIR) && !(status.stx_mask & STATX_BTIME)) {
        /* /proc, for example; a tree on such a file system is refused at the start. */
        status.stx_btime.tv_sec = 0, status.stx_btime.tv_nsec = 0;
    }
    id->inode = status.stx_ino ^
             ((uint64_t)makedev(status.stx_dev_major, status.stx_dev_minor) << 40);
    id->birth = (uint64_t)status.stx_btime.tv_sec * 1000000000ull + status.stx_btime.tv_nsec;
    if (size) *size = status.stx_size;
    return type;
}

static int is_inside(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < (ssize_t)root_length || memcmp(path, root, root_length)) return 0;
    path[n] = 0;
    return path[root_length] == 0 || path[root_length] == '/';
}

/* The file behind a descriptor, or NULL if it is not a regular file of the tree. Locked. */
static File *file_of(int descriptor, uint64_t *size) {
    Id id;
    if (identify(descriptor, "", AT_EMPTY_PATH, &id, size) != S_IFREG) return NULL;
    int cached = descriptor >= 0 && descriptor < FD_MAX;
    File *file = cached ? of_descriptor[descriptor] : NULL;
    if (!file || file->id.inode != id.inode || file->id.birth != id.birth) {
        File **bucket = &buckets[(id.inode * 31 + id.birth) % 4096];
        for (file = *bucket; file; file = file->next)
            if (file->id.inode == id.inode && file->id.birth == id.birth) break;
        if (!file) {
            file = calloc(1, sizeof *file);
            if (!file) fail("out of memory");
            file->id = id;
            file->inside = is_inside(descriptor);
            file->whole = continuing;
            file->size_min = UINT64_MAX;
            file->next = *bucket;
            *bucket = file;
        }
        if (cached) of_descriptor[descriptor] = file;
    }
    return file->inside ? file : NULL;
}

static void note_write(int descriptor, uint64_t start, uint64_t length, int at_position) {
    int saved = errno;
    lock();
    uint64_t size;
    File *file = file_of(descriptor, &size);
    if (file && length && !file->whole) {
        if (at_position) { /* Where the write ended is where the position is now. */
            int appending = fcntl(descriptor, F_GETFL) & O_APPEND;
            start = (appending ? size : (uint64_t)lseek(descriptor, 0, SEEK_CUR)) - length;
        }
        Range *last = file->count ? &file->ranges[file->count - 1] : NULL;
        if (at_position && fcntl(descriptor, F_GETFL) & O_APPEND) {
            file->whole = 1; /* Several writers may append: the end is not surely this one's. */
        } else if (last && start >= last->start && start <= last->stop) {
            if (start + length > last->stop) last->stop = start + length;
        } else {
            if (file->count == file->capacity) {
                file->capacity = file->capacity ? file->capacity * 2 : 16;
                file->ranges = realloc(file->ranges, file->capacity * sizeof(Range));
                if (!file->ranges) fail("out of memory");
            }
            file->ranges[file->count++] = (Range){start, start + length};
        }
    }
    unlock();
    errno = saved;
}

static void note_size(int descriptor, uint64_t size) {
    int saved = errno;
    lock();
    File *file = file_of(descriptor, NULL);
    if (file && size < file->size_min) file->size_min = size;
    unlock();
    errno = saved;
}

static void note_whole(int descriptor) {
    int saved = errno;
    lock();
    File *file = file_of(descriptor, NULL);
    if (file) file->whole = 1;
    unlock();
    errno = saved;
}

/* ---- what becomes durable; all locked ---- */

static void put_range(Buffer *buffer, int descriptor, uint64_t start, uint64_t stop) {
    char chunk[1 << 16];
    size_t header = buffer->size;
    put_u64(buffer, start);
    put_u64(buffer, 0);
    uint64_t position = start;
    while (position < stop) {
        size_t wanted = stop - position < sizeof chunk ? stop - position : sizeof chunk;
        ssize_t n = pread64(descriptor, chunk, wanted, (off64_t)position);
        if (n < 0) fail("cannot read what is synced");
        if (n == 0) break; /* Truncated meanwhile; the final size says so too. */
        put(buffer, chunk, (size_t)n);
        position += (uint64_t)n;
    }
    uint64_t length = position - start;
    memcpy(buffer->data + header + 8, &length, 8);
}

static void commit_file(File *file, int descriptor) {
    /* SQLite's descriptors can be read. Opening those again, and closing that, would drop locks. */
    int readable = (fcntl(descriptor, F_GETFL) & O_ACCMODE) != O_WRONLY;
    int source = descriptor;
    if (!readable) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        source = real_openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC);
        if (source < 0) fail("cannot read what is synced");
    }
    Id id;
    uint64_t size;
    identify(source, "", AT_EMPTY_PATH, &id, &size);
    int whole = file->whole || size <= WHOLE_BELOW;
    Buffer buffer;
    begin(&buffer, 'F', file->id);
    put_u64(&buffer, whole ? 0 : file->size_min);
    put_u64(&buffer, size);
    put_u64(&buffer, whole ? 1 : file->count);
    if (whole) put_range(&buffer, source, 0, size);
    else
        for (size_t i = 0; i < file->count; i++)
            put_range(&buffer, source, file->ranges[i].start, file->ranges[i].stop);
    end(&buffer);
    file->count = 0, file->whole = 0, file->size_min = UINT64_MAX;
    if (!readable) close(source);
}

/* Record a directory's entries; with `deep` everything below it, contents included. */
static void commit_directory(int descriptor, int deep) {
    Id id;
    identify(descriptor, "", AT_EMPTY_PATH, &id, NULL);
    int again = real_openat(descriptor, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = again < 0 ? NULL : fdopendir(again);
    if (!stream) {
        if (errno == ENOENT) return; /* Removed: nobody can see its entries any more. */
        fail("cannot list a directory");
    }
    Buffer buffer;
    begin(&buffer, 'D', id);
    for (struct dirent *entry; (entry = readdir(stream));) {
        const char *name = entry->d_name;
        Id child;
        if (!strcmp(name, ".") || !strcmp(name, "..")) continue;
        mode_t type = identify(again, name, AT_SYMLINK_NOFOLLOW, &child, NULL);
        if (type != S_IFREG && type != S_IFDIR) continue; /* Just removed, or a socket. */
        put_id(&buffer, child);
        put_u64(&buffer, type == S_IFDIR ? 'D' : 'F');
        put_u64(&buffer, strlen(name));
        put(&buffer, name, strlen(name));
        if (!deep) continue;
        int below = real_openat(again, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        if (below < 0) fail("cannot read the tree");
        if (type == S_IFDIR) commit_directory(below, 1);
        else commit_file(&(File){.id = child, .whole = 1}, below);
        close(below);
    }
    end(&buffer);
    closedir(stream);
}

static int commit(int descriptor, int (*real)(int)) {
    if (log_descriptor < 0) return real(descriptor);
    int result = 0;
    Id id;
    lock();
    mode_t type = identify(descriptor, "", AT_EMPTY_PATH, &id, NULL);
    if (type == S_IFDIR && is_inside(descriptor)) {
        commit_directory(descriptor, 0);
    } else {
        File *file = type == S_IFREG ? file_of(descriptor, NULL) : NULL;
        if (file) commit_file(file, descriptor);
        else if (type != S_IFREG && type != S_IFDIR) result = real(descriptor);
    }
    unlock();
    return result;
}

/* ---- start ---- */

#define REAL(name, symbol) \
    if (!(*(void **)&real_##name = dlsym(RTLD_NEXT, symbol))) fail("no " symbol)

static void resolve(void) {
    if (real_write) return;
    REAL(pwrite, "pwrite64");
    REAL(writev, "writev");
    REAL(pwritev, "pwritev64");
    REAL(pwritev2, "pwritev64v2");
    REAL(ftruncate, "ftruncate64");
    REAL(truncate, "truncate64");
    REAL(fallocate, "fallocate64");
    REAL(posix_fallocate, "posix_fallocate64");
    REAL(sendfile, "sendfile64");
    REAL(copy_file_range, "copy_file_range");
    REAL(openat, "openat64");
    REAL(fsync, "fsync");
    REAL(fdatasync, "fdatasync");
    REAL(write, "write");
}

/* As a process starts; or when it asks, if it has set the variables since (a fork that begins). */
__attribute__((constructor)) void powerloss_start(void) {
    resolve();
    const char *tree = getenv("POWERLOSS_ROOT"), *log_path = getenv("POWERLOSS_LOG");
    if (!tree || !log_path || !realpath(tree, root)) return;
    root_length = strlen(root);
    int top = real_openat(AT_FDCWD, root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0) return;
    Id id;
    if (identify(top, "", AT_EMPTY_PATH, &id, NULL) != S_IFDIR || !id.birth)
        fail("the file system of POWERLOSS_ROOT does not know times of birth");
    int flags = O_WRONLY | O_APPEND | O_CLOEXEC;
    log_descriptor = real_openat(AT_FDCWD, log_path, flags | O_CREAT | O_EXCL, 0644);
    if (log_descriptor >= 0) { /* The first process: what is there now is durable. */
        Buffer buffer;
        begin(&buffer, 'R', id);
        end(&buffer);
        commit_directory(top, 1);
        begin(&buffer, 'S', id); /* The start is complete; the program begins to run after this. */
        end(&buffer);
    } else {
        continuing = 1;
        log_descriptor = real_openat(AT_FDCWD, log_path, flags);
        if (log_descriptor < 0) fail("cannot open POWERLOSS_LOG");
    }
    close(top);
    pthread_atfork(lock, unlock, unlock);
}

/* ---- the calls ---- */

#define RETURN_NOTED(call, note) \
    do { \
        resolve(); \
        __typeof__(call) result = (call); \
        if (result >= 0 && log_descriptor >= 0) { note; } \
        return result; \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    RETURN_NOTED(real_write(fd, data, size), note_write(fd, 0, (uint64_t)result, 1));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    RETURN_NOTED(real_writev(fd, parts, count), note_write(fd, 0, (uint64_t)result, 1));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    RETURN_NOTED(real_pwrite(fd, data, size, at),
                 note_write(fd, (uint64_t)at, (uint64_t)result, 0));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return pwrite64(fd, data, size, at);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    RETURN_NOTED(real_pwritev(fd, parts, count, at),
                 note_write(fd, (uint64_t)at, (uint64_t)result, 0));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    return pwritev64(fd, parts, count, at);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    RETURN_NOTED(real_pwritev2(fd, parts, count, at, flags), note_whole(fd));
}
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    return pwritev64v2(fd, parts, count, at, flags);
}
int ftruncate64(int fd, off64_t size) {
    RETURN_NOTED(real_ftruncate(fd, size), note_size(fd, (uint64_t)size));
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int truncate64(const char *path, off64_t size) {
    resolve();
    int fd = real_openat(AT_FDCWD, path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return real_truncate(path, size);
    int result = ftruncate64(fd, size);
    close(fd);
    return result;
}
int truncate(const char *path, off_t size) { return truncate64(path, size); }
int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    RETURN_NOTED(real_fallocate(fd, mode, at, size), if (mode) note_whole(fd));
}
int fallocate(int fd, int mode, off_t at, off_t size) { return fallocate64(fd, mode, at, size); }
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    RETURN_NOTED(real_posix_fallocate(fd, at, size), note_whole(fd));
}
int posix_fallocate(int fd, off_t at, off_t size) { return posix_fallocate64(fd, at, size); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    RETURN_NOTED(real_sendfile(out, in, at, size), note_whole(out));
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    return sendfile64(out, in, (off64_t *)at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    RETURN_NOTED(real_copy_file_range(in, from, out, to, size, flags), note_whole(out));
}
int fsync(int fd) { resolve(); return commit(fd, real_fsync); }
int fdatasync(int fd) { resolve(); return commit(fd, real_fdatasync); }

/* Opening matters only for O_TRUNC. */
static int open_noted(int directory, const char *path, int flags, mode_t mode) {
    RETURN_NOTED(real_openat(directory, path, flags, mode),
                 if (flags & O_TRUNC && (flags & O_ACCMODE) != O_RDONLY) note_size(result, 0));
}

#define MODE_ARGUMENT(last) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list arguments; \
        va_start(arguments, last); \
        mode = va_arg(arguments, mode_t); \
        va_end(arguments); \
    }

int open(const char *path, int flags, ...) {
    MODE_ARGUMENT(flags);
    return open_noted(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE_ARGUMENT(flags);
    return open_noted(AT_FDCWD, path, flags, mode);
}
int openat(int directory, const char *path, int flags, ...) {
    MODE_ARGUMENT(flags);
    return open_noted(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    MODE_ARGUMENT(flags);
    return open_noted(directory, path, flags, mode);
}
int creat(const char *path, mode_t mode) {
    return open_noted(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int __open_2(const char *path, int flags) { return open_noted(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_noted(AT_FDCWD, path, flags, 0); }
int __openat_2(int d, const char *path, int flags) { return open_noted(d, path, flags, 0); }
int __openat64_2(int d, const char *path, int flags) { return open_noted(d, path, flags, 0); }
